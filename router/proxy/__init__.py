"""HTTP in and out: what clients send is taken apart strictly, sent on afresh, and what comes back is streamed."""
