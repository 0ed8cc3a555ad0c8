"""What the network stands on: tensor parallelism and the key/value cache."""
