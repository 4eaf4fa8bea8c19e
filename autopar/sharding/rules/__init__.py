"""One file per kind of operator; presence is registration. See `autopar.sharding.rule`."""
