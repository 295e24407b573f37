"""Descriptor pool of the package `inference`.

tritonclient registers messages of the same names in protobuf's default pool. With a pool of our own
both can be imported by one process.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
