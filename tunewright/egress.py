"""The one client for addresses that callers name. Nothing else in the product dials them."""
