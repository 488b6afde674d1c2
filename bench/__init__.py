"""What llamastate costs, against the same work done by hand and by others. ``make bench`` runs it."""
