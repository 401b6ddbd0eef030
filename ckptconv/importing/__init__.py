"""Rule files made from what other programs say about their own layouts."""
