"""Who a peer is and how it proves it: keys, signed envelopes, digests. Imports nothing of ours."""
