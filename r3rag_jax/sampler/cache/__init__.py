"""The KV cache: one class per layout, behind one factory."""
