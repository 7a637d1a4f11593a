"""The statistics of the parents on calibration text, and the averages that use them."""
