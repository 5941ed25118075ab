"""The service's components as plain classes without Ray, so that they can also be used and tested in one process.

`app.py` turns them into Ray Serve deployments.
"""
