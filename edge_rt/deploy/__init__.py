"""The adaptation compiler: fits one model to many devices ("train once, deploy everywhere"), and says beforehand what it will do there."""
