"""INT8 engines: calibration, quantisation, and the check that little accuracy is lost."""
