"""Uploads in parts beside the native dataset routes."""

from tunewright.api.native.jobs import PREFIX
from tunewright.api.uploads import UploadRoutes

router = UploadRoutes().router(PREFIX)
