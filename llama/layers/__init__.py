"""What the network is built from: tensor parallelism, the key/value cache, token id checks."""
