"""What runs in replicas: plain classes without Ray in them, so that they are used and tested in one process too.

`app.py` makes Ray Serve deployments of them.
"""
