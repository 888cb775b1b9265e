"""The compiler's passes, a file each."""
