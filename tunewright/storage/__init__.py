"""Rows in SQLite or PostgreSQL through SQLAlchemy Core, bytes in blobs through obstore. The only user of both."""

from tunewright.storage.blobs import Blobs
from tunewright.storage.database import Storage, Transaction

__all__ = ["Blobs", "Storage", "Transaction"]
