"""Data sets: importing, auditing and splitting them. Free of torch."""
