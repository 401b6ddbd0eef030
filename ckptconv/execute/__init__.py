"""The hands: sources read, outputs filled, results staged and published."""
