"""Token shards, and how they become micro-batches: which tokens each step of each rank sees."""
