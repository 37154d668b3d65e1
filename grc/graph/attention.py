"""What an attention's scores become: the `kind` of `grc.attention`, and of `Kind` in its C++ kernel."""

# Softmax gives zeros where a query sees no key, as F.scaled_dot_product_attention does, the strict one NaN,
# as aten.softmax does.
SOFTMAX, STRICT_SOFTMAX, SILU = range(3)
