"""What Fisher averaging and RegMean measure of a parent from calibration text."""
