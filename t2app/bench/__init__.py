"""What things cost, by the name that the command line uses; one file a bench."""

from collections.abc import Callable, Iterator

from t2app.bench.decode import bench_decode
from t2app.bench.figure import Figure
from t2app.bench.products import bench_products
from t2app.bench.start import bench_start
from t2app.bench.training import bench_training

BENCHES: dict[str, Callable[[str, str], Iterator[Figure]]] = {
    "decode": bench_decode,
    "start": bench_start,
    "products": bench_products,
    "training": bench_training,
}
