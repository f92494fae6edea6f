"""HTTP servers: who may ask and how much, how one starts and how it ends."""
