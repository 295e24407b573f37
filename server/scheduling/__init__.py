"""Schedulers: which request is admitted, which batch runs next. Pure: virtual time, no I/O."""
