"""What of a teacher carries the value: measured on the user's samples, ranked and explained."""
