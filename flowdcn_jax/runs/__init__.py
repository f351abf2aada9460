"""What a run's folder holds, and how it is split over devices; whoever works with runs uses it."""
