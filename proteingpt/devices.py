"""What the data sheets say of devices, by the names that their drivers give them."""

# Dense bf16 matrix rate, FLOP/s, from NVIDIA's data sheets (the sheets' figures "with sparsity" are twice these). The
# first key that a device's name holds counts, so the particular stands before the general.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak_flops(name: str) -> float | None:
    """Of a device by its driver's name ("NVIDIA A100-SXM4-40GB"), in FLOP/s; None for one that no sheet here knows."""
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
