"""Embedded servers, and rehearsals on this machine."""
