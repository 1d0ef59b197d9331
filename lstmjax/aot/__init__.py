"""Compile for devices that are not there."""
