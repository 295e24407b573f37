"""TLS records in a stream of bytes (RFC 8446, 5.1): which are whole, and how many."""

from __future__ import annotations

import ssl

HEAD_BYTES = 5  # type, version, length
MAX_RECORD_BYTES = HEAD_BYTES + 16_384 + 2_048  # TLS 1.2; RFC 5246, 6.2.3


def record_bytes(data: bytes | bytearray, at: int) -> int:
    """The size of the record that starts there, with its head."""
    return HEAD_BYTES + (data[at + 3] << 8 | data[at + 4])


class RecordQueue:
    """Bytes of a connection, passed on to OpenSSL as whole records.

    OpenSSL reads all records that it has until one holds data. So it must not have many: a client
    can send 10,000 changes of its key in 256 KB, which take 0.2 s.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._start = 0  # of what was not passed on
        self._record = bytearray()  # the start of a record whose end has not come

    def put(self, data: bytes) -> None:
        if self._start < len(self._data):
            data = self._data[self._start :] + data
        self._data, self._start = data, 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing, or only a part of a record."""
        return self._start == len(self._data)

    def pass_on(self, to: ssl.MemoryBIO, max_records: int, max_bytes: int) -> int:
        """Passes whole records on, at least one if there is one. Returns how many."""
        count = self._complete_record(to) if self._record else 0
        data, start = self._data, self._start
        at, size, stop = start, len(self._data), start + max_bytes
        while count < max_records and at < stop:
            end = at + (record_bytes(data, at) if at + HEAD_BYTES <= size else HEAD_BYTES)
            if end > size:
                self._record += data[at:]
                size = at
                break
            at = end
            count += 1
        if at > start:
            to.write(data if at - start == len(data) else memoryview(data)[start:at])
        self._start = at if size == len(data) else len(data)
        return count

    def _complete_record(self, to: ssl.MemoryBIO) -> int:
        """Adds to the record that has begun, and passes it on if it is whole. Returns 1 then."""
        record = self._record
        for _ in range(2):  # first its head, which has the length of the rest
            needed = record_bytes(record, 0) if len(record) >= HEAD_BYTES else HEAD_BYTES
            end = self._start + needed - len(record)
            record += self._data[self._start : end]
            self._start = min(end, len(self._data))
            if len(record) < needed:
                return 0
        to.write(record)
        record.clear()
        return 1
