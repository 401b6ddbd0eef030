"""What is said about a run: report objects, and their views as text and JSON. A report decides nothing."""
