"""Adapter and checkpoint to Plan, without reading tensor data."""
