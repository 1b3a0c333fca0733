"""The dialect of the Zhipu SDKs, under /api/paas/v4."""
