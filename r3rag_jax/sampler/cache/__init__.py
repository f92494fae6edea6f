"""The KV cache: one class per memory layout, chosen by `kv_cache.make_layer_cache`."""
