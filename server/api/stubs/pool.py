"""Descriptor pool of the protobuf package `inference`.

tritonclient registers messages of the same names in protobuf's default pool. With a separate pool,
one process can import both.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
