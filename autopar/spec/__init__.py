"""Pydantic models of every spec file, and how they are found and read."""

from autopar.spec.cluster import ClusterSpec
from autopar.spec.job import Batch, Data, Job, Optimizer, Pins, Search, Train
from autopar.spec.load import load_job
from autopar.spec.origin import ModelOrigin

__all__ = ["Batch", "ClusterSpec", "Data", "Job", "ModelOrigin", "Optimizer", "Pins", "Search", "Train", "load_job"]
