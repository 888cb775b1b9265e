"""Rewards that can be verified, rollouts, and what a student learns from them."""
