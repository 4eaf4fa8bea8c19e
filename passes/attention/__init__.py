"""Passes that replace written-out attention by fused operators."""
