"""What things cost, by the name that the command line uses; one file a bench."""

from collections.abc import Callable, Iterator

from t2app.bench.basis import bench_basis
from t2app.bench.decode import bench_decode
from t2app.bench.figure import Figure
from t2app.bench.first_pass import bench_first_pass
from t2app.bench.products import bench_products
from t2app.bench.profile import bench_profile
from t2app.bench.recommended import bench_recommended
from t2app.bench.search import bench_search
from t2app.bench.start import bench_start
from t2app.bench.training import bench_training
from t2app.bench.wordings import bench_wordings

BENCHES: dict[str, Callable[[str, str], Iterator[Figure]]] = {
    "decode": bench_decode,
    "profile": bench_profile,
    "start": bench_start,
    "products": bench_products,
    "training": bench_training,
    "first-pass": bench_first_pass,
    "wordings": bench_wordings,
    "search": bench_search,
    "recommended": bench_recommended,
    "basis": bench_basis,
}
