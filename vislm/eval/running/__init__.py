"""Running a benchmark: pictures ahead, models, one row per sample, resuming, many processes."""
