"""Copies are found and nothing else is: brute force, planted copies of real tiles, simulated level and power."""
import csv
import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from lesion.stats import memorisation

NAME = "ISIC_2024_Permissive_Training_Input"


@pytest.fixture(scope="module")
def real(shared):
    """(training tiles [1500,128,128,3], held-out tiles of other patients [1400,128,128,3]) uint8."""
    with open(shared / "isic2024" / "patient_split.csv", encoding="utf-8") as file:
        split = {row["isic_id"]: row["split"] for row in csv.DictReader(file)}
    sets = {"train": [], "val": []}
    with zipfile.ZipFile(shared / "isic2024" / f"{NAME}.zip") as archive:
        for tile, part in split.items():
            if len(sets[part]) < {"train": 1500, "val": 1400}[part]:
                with Image.open(io.BytesIO(archive.read(f"{NAME}/{tile}.jpg"))) as picture:
                    sets[part].append(np.asarray(picture.convert("RGB").resize((128, 128), Image.BICUBIC)))
    return np.stack(sets["train"]), np.stack(sets["val"])


@pytest.fixture(scope="module")
def searched(real):
    """(training tiles, their vectors, what a search for the held-out tiles among them found)."""
    vectors = memorisation.pixel_vectors(real[0])
    return real[0], vectors, memorisation.nearest_pixels(real[1], vectors)


def to_u8(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def jpeg(images, quality):
    out = []
    for image in images:
        data = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(data, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(data)))
    return np.stack(out)


PLANTS = {
    "exact": lambda x, rng: x,
    "mirrored": lambda x, rng: x[:, :, ::-1],
    "upside down": lambda x, rng: x[:, ::-1],
    "turned": lambda x, rng: np.rot90(x, 1, (1, 2)),
    "turned back and mirrored": lambda x, rng: np.rot90(x[:, :, ::-1], 3, (1, 2)),
    "noise of 10 grey levels": lambda x, rng: to_u8(x + rng.normal(0, 10, x.shape)),
    "noise of 15 grey levels": lambda x, rng: to_u8(x + rng.normal(0, 15, x.shape)),
    "JPEG at quality 75": lambda x, rng: jpeg(x, 75),
    "JPEG at quality 50": lambda x, rng: jpeg(x, 50),
    "25 levels brighter": lambda x, rng: to_u8(x + 25.0),
    "darker and warmer": lambda x, rng: to_u8(x * [0.9, 0.8, 0.7]),
    "turned, JPEG, darker, noise": lambda x, rng: to_u8(jpeg(np.rot90(x, 1, (1, 2)), 60) * 0.9
                                                        + rng.normal(0, 5, x.shape)),
}


def test_every_planted_copy_is_found_at_one_per_cent_false_alarms(searched):
    """Real tiles: the limit from held-out tiles, patients the training set does not know, calls under 1 % of them
    copies, and each half's limit no more of the other half than a binomial of 1 % allows. All three limits find all of
    12 kinds of planted copies with the right origin; so would one that 0.75 % of the held-out tiles fall below."""
    training, vectors, held_out = searched
    distances = held_out.relative[:, None]
    limit = memorisation.thresholds(distances)
    assert memorisation.copies(distances, limit).mean() < 0.01
    for half, other in ((distances[::2], distances[1::2]), (distances[1::2], distances[::2])):
        assert memorisation.copies(other, memorisation.thresholds(half)).sum() <= stats.binom.ppf(0.99, 700, 0.01)
        limit = np.minimum(limit, memorisation.thresholds(half))
    rng = np.random.default_rng(0)
    origin, worst = np.arange(0, 1500, 15), 0.0
    for kind, plant in PLANTS.items():
        found = memorisation.nearest_pixels(plant(training[origin], rng), vectors)
        assert memorisation.copies(found.relative[:, None], limit).all(), kind
        assert (found.index == origin).all(), kind
        worst = max(worst, found.relative.max())
    assert (distances <= worst).mean() <= 0.0075


def test_plain_distances_miss_what_relative_ones_find(searched):
    """Why the distance is relative: noisy copies of plain skin are farther than some real tiles are from each other."""
    training, vectors, held_out = searched
    plain = held_out.distance[:, None]
    noisy = to_u8(training[::15] + np.random.default_rng(1).normal(0, 20, training[::15].shape))
    found = memorisation.nearest_pixels(noisy, vectors).distance[:, None]
    assert not memorisation.copies(found, memorisation.thresholds(plain)).all()


def test_nearest_is_brute_force_over_views(monkeypatch):
    """Index, view, distance and relative distance equal a loop over every query, training tile and view."""
    monkeypatch.setattr(memorisation, "BLOCK", 4)
    rng = np.random.default_rng(2)
    training = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    queries = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    queries[3] = np.rot90(training[7][:, ::-1], 2)
    found = memorisation.nearest_pixels(queries, memorisation.pixel_vectors(training))
    for q in range(5):
        distances = np.array([[np.linalg.norm(plain_vector(view[0]) - plain_vector(tile)) for tile in training]
                              for view in memorisation.views(queries[q:q + 1])])
        ordered = np.sort(distances.min(0))
        assert found.index[q] == distances.min(0).argmin()
        assert found.view[q] == distances[:, found.index[q]].argmin()
        assert found.distance[q] == pytest.approx(ordered[0], abs=1e-5)
        assert found.relative[q] == pytest.approx(ordered[0] / ordered[4], abs=1e-5)
    assert found.index[3] == 7
    assert found.relative[3] < 1e-5


def plain_vector(image):
    """The definition, one tile at a time: 16 x 16 area means, channel means off, unit length."""
    small = np.array([[image[y:y + 2, x:x + 2].mean((0, 1)) for x in range(0, 32, 2)] for y in range(0, 32, 2)])
    small -= small.mean((0, 1))
    return (small / np.linalg.norm(small)).ravel()


def test_views_are_the_eight_of_the_square():
    """Eight different views; view v is v % 4 quarter turns, then mirrored from 4 on."""
    image = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    seen = memorisation.views(image)
    assert len({view.tobytes() for view in seen}) == 8
    np.testing.assert_array_equal(seen[5][0], np.rot90(image[0], 1)[:, ::-1])


def test_flat_and_repeated_tiles_are_not_nan():
    """A tile of one colour has a finite vector; a copy of a tile that the training set holds six times has relative
    distance 0, not 0 / 0."""
    flat = np.full((6, 64, 64, 3), 120, np.uint8)
    vectors = memorisation.pixel_vectors(flat)
    assert np.isfinite(vectors).all()
    found = memorisation.nearest_pixels(flat[:1], vectors)
    assert (found.distance[0], found.relative[0]) == (0, 0)


def test_thresholds_hold_their_level_for_one_measure_and_for_two():
    """Fresh tiles of the same distribution fall below with probability <= 1 %, on average over 400 calibrations, also
    where two correlated measures may each raise the alarm; for one measure the limit is the k-th smallest."""
    rng = np.random.default_rng(4)
    one = rng.random(1000)
    assert memorisation.thresholds(one[:, None])[0] == np.sort(one)[9]  # floor(.01 x 1001) = 10
    for measures in (1, 2):
        alarms = []
        for _ in range(400):
            sample = rng.normal(size=(1500, 1)) + rng.normal(size=(1500, measures))
            alarms.append(memorisation.copies(sample[500:], memorisation.thresholds(sample[:500])).mean())
        assert 0.006 < np.mean(alarms) < 0.0105
    with pytest.raises(ValueError, match="at least 99 are needed"):
        memorisation.thresholds(rng.random((98, 1)))
    with pytest.raises(ValueError, match="not finite"):
        memorisation.thresholds(np.full((200, 1), np.nan))


def test_three_sample_z_is_the_mann_whitney_test():
    """z gives scipy's one-sided asymptotic p (no continuity correction), and the count of pairs done by hand."""
    rng = np.random.default_rng(5)
    synthetic, held_out = rng.normal(size=40), rng.normal(0.3, 1, 55)
    result = memorisation.three_sample(synthetic, held_out)
    by_hand = (synthetic[:, None] > held_out).sum()
    assert result.z == pytest.approx((by_hand - 40 * 55 / 2) / np.sqrt(40 * 55 * 96 / 12))
    scipys = stats.mannwhitneyu(synthetic, held_out, alternative="less", method="asymptotic", use_continuity=False)
    assert result.p == pytest.approx(scipys.pvalue)
    assert result.c_t is None


def draw(rng, n, copied=0.0, training=None):
    """n points of a ring of 4 clusters in the plane, a share of them copies of training points with little noise."""
    points = rng.normal(size=(n, 2)) * 0.5 + 4 * np.eye(4)[rng.integers(0, 4, n)] @ np.array(
        [[1, 0], [0, 1], [-1, 0], [0, -1]])
    mask = rng.random(n) < copied
    if mask.any():
        points[mask] = training[rng.integers(0, len(training), mask.sum())] + rng.normal(0, 0.01, (mask.sum(), 2))
    return points


def run_three_sample(rng, copied, region=None):
    training, held_out = draw(rng, 300), draw(rng, 200)
    synthetic = draw(rng, 200, copied, training)
    if region is not None:  # copies in one cluster only, the others far off the training tiles
        near = training[training[:, 0] > 2]
        synthetic = np.where(synthetic[:, :1] > 2, near[rng.integers(0, len(near), 200)], synthetic
                             + rng.normal(0, 1, (200, 2)))
    distances = [memorisation.nearest([points], training).distance for points in (synthetic, held_out)]
    return memorisation.three_sample(*distances, *memorisation.cells(training, synthetic, held_out, count=4))


def test_three_sample_holds_its_level_and_finds_copies():
    """Null: in 150 simulations neither the whole nor the cells reject more often than 5 % allows. A third copied: both
    reject in all of 20. Copies in one region and under-fitting elsewhere: the cell shows what the whole hides."""
    rng = np.random.default_rng(6)
    null = [run_three_sample(rng, 0.0) for _ in range(150)]
    bound = stats.binom.ppf(0.999, 150, 0.05)
    assert sum(r.p < 0.05 for r in null) <= bound
    assert sum(r.c_t_p < 0.05 for r in null) <= bound
    assert np.std([r.c_t for r in null]) == pytest.approx(0.5, abs=0.12)  # 4 equal cells: sqrt(4 / 16)
    copied = [run_three_sample(rng, 0.35) for _ in range(20)]
    assert all(r.p < 0.01 and r.c_t_p < 0.01 for r in copied)
    mixed = run_three_sample(rng, 0.0, region=True)
    assert mixed.z > -1
    assert min(row["z"] for row in mixed.cells) < -5


def test_three_sample_finds_planted_copies_among_real_tiles(searched):
    """Real tiles: one in five synthetic tiles is a turned training tile, the rest are unseen real ones; with none
    planted it does not reject."""
    training, vectors, held_out = searched
    distance = held_out.distance
    assert memorisation.three_sample(distance[::2], distance[1::2]).p > 0.05
    planted = memorisation.nearest_pixels(np.rot90(training[:140], 1, (1, 2)), vectors).distance
    assert memorisation.three_sample(np.r_[distance[::2][:560], planted], distance[1::2]).p < 1e-6


def test_three_sample_z_with_ties():
    """With a third of the distances equal (exact copies), z is that of scipy's Mann-Whitney test with its tie correction,
    and its level holds under permutation; without the correction z would be several per cent short."""
    rng = np.random.default_rng(4)
    distances = np.concatenate([np.zeros(40), rng.random(40), np.round(rng.random(40), 1)])
    found = []
    for _ in range(400):
        order = rng.permutation(distances)
        result = memorisation.three_sample(order[:50], order[50:])
        p = stats.mannwhitneyu(order[:50], order[50:], alternative="less", method="asymptotic", use_continuity=False).pvalue
        assert result.p == pytest.approx(p, rel=1e-9)
        found.append(result.z)
    assert np.std(found) == pytest.approx(1, abs=0.08)
    assert memorisation.three_sample(np.ones(20), np.ones(30)).z == 0


@pytest.mark.parametrize(("call", "said"), [
    (lambda: memorisation.pixel_vectors(np.zeros((2, 40, 40, 3), np.uint8)), "16 divides"),
    (lambda: memorisation.nearest([np.zeros((2, 3))], np.zeros((4, 3))), "at least 5"),
    (lambda: memorisation.three_sample(np.array([]), np.ones(3)), "finite distances of synthetic"),
    (lambda: memorisation.three_sample(np.ones(3), np.array([np.nan])), "finite distances of held-out"),
])
def test_bad_input_is_one_line(call, said):
    """Shapes, too few training tiles, no or NaN distances: one line that says what is needed."""
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_cells_weigh_by_their_held_out_tiles():
    """30 and 90 held-out tiles in two cells with 60 and 20 synthetic ones: c_t is a quarter and three quarters of the cells' z."""
    rng = np.random.default_rng(7)
    result = memorisation.three_sample(rng.random(80), rng.random(120) + 0.2, np.repeat([0, 1], [60, 20]), np.repeat([0, 1], [30, 90]))
    z = [row["z"] for row in result.cells]
    assert result.c_t == pytest.approx(0.25 * z[0] + 0.75 * z[1])
    assert result.c_t_p == pytest.approx(stats.norm.cdf(result.c_t / np.sqrt(0.25 ** 2 + 0.75 ** 2)))


def test_cells_come_again():
    """The same tiles fall into the same cells in every call: the report's numbers can be computed again."""
    vectors = np.random.default_rng(8).normal(size=(300, 5))
    first = memorisation.cells(vectors, vectors)[0]
    assert all((memorisation.cells(vectors, vectors)[0] == first).all() for _ in range(4))


def test_a_nearly_flat_tile_is_not_blown_up():
    """Under one grey level of contrast a tile's vector is as long as its contrast, not 1: noise alone makes no unit vector."""
    image = np.full((1, 16, 16, 3), 120, np.uint8)
    image[0, ::2, :, 0] = 121  # deviation of half a level in one channel of three
    assert np.linalg.norm(memorisation.pixel_vectors(image)) == pytest.approx(0.5 / np.sqrt(3), rel=1e-5)
