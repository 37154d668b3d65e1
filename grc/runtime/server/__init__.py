"""The server: artifacts behind the Open Inference Protocol, over HTTP and gRPC.

`start.py` runs it, `http.py` and `grpc.py` speak the protocol, `scheduler.py` merges what waits and decides who is next.
"""
