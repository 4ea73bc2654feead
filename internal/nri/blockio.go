package nri

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"cri-dockerd/internal/text"
)

// The weights of block I/O that the kernel accepts
// (Documentation/admin-guide/cgroup-v1/blkio-controller.rst).
const (
	minWeight = 10
	maxWeight = 1000
)

const (
	deviceDir = "/dev"
	// maxBlockDevices limits the devices of a class.
	maxBlockDevices = 1024
)

// blockIOFile is a file of --nri-blockio-config. Its format is that of containerd and CRI-O.
type blockIOFile struct {
	Classes map[string][]blockIORule `yaml:"Classes"`
}

// blockIORule has parameters of devices, or without Devices the weight of all others.
type blockIORule struct {
	Devices           []string `yaml:"Devices"` // patterns of paths, see path.Match
	Weight            *uint16  `yaml:"Weight"`
	ThrottleReadBps   quantity `yaml:"ThrottleReadBps"` // bytes per second
	ThrottleWriteBps  quantity `yaml:"ThrottleWriteBps"`
	ThrottleReadIOPS  quantity `yaml:"ThrottleReadIOPS"` // operations per second
	ThrottleWriteIOPS quantity `yaml:"ThrottleWriteIOPS"`
}

// quantity is a number with a suffix of Kubernetes' quantities, such as 10k or 4Mi. 0 is no limit.
type quantity uint64

// suffixes are the factors of quantities.
var suffixes = map[string]uint64{
	"":   1,
	"k":  1e3,
	"M":  1e6,
	"G":  1e9,
	"T":  1e12,
	"Ki": 1 << 10,
	"Mi": 1 << 20,
	"Gi": 1 << 30,
	"Ti": 1 << 40,
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (q *quantity) UnmarshalYAML(n *yaml.Node) error {
	digits := strings.TrimRight(n.Value, "kKMGTi")
	factor, known := suffixes[n.Value[len(digits):]]
	value, err := strconv.ParseUint(digits, 10, 64)
	if n.Kind != yaml.ScalarNode || !known || err != nil || value > math.MaxUint64/factor {
		return fmt.Errorf("line %d: %q is not a whole number with one of the suffixes k, M, G, T, Ki, Mi, Gi, Ti",
			n.Line, text.Clean(n.Value, text.MaxName))
	}
	*q = quantity(value * factor)

	return nil
}

// CheckBlockIO returns the error of a file for --nri-blockio-config. root is a prefix of the path.
func CheckBlockIO(root, file string) error {
	_, err := readBlockIO(root, file)
	return err
}

// readBlockIO reads the classes of block I/O, none without a file. root is a prefix of the path.
func readBlockIO(root, file string) (map[string][]blockIORule, error) {
	if file == "" {
		return nil, nil
	}

	var content blockIOFile
	if err := readYAML(root, file, &content); err != nil {
		return nil, err
	}

	for name, rules := range content.Classes {
		for i, r := range rules {
			if err := r.check(); err != nil {
				return nil, fmt.Errorf("%s: class %q, item %d: %w", file, text.Clean(name, text.MaxName), i+1, err)
			}
		}
	}

	return content.Classes, nil
}

// check returns an error for a rule that cannot be carried out.
func (r *blockIORule) check() error {
	limits := r.ThrottleReadBps | r.ThrottleWriteBps | r.ThrottleReadIOPS | r.ThrottleWriteIOPS
	switch {
	case r.Weight != nil && (*r.Weight < minWeight || *r.Weight > maxWeight):
		return fmt.Errorf("the Weight %d is not between %d and %d", *r.Weight, minWeight, maxWeight)
	case len(r.Devices) == 0 && limits != 0:
		return errors.New("limits without Devices")
	case r.Weight == nil && limits == 0:
		return errors.New("neither Weight nor a limit")
	}

	for _, pattern := range r.Devices {
		if _, err := path.Match(pattern, ""); err != nil || !strings.HasPrefix(pattern, deviceDir+"/") {
			return fmt.Errorf("the item %q of Devices is not a pattern of paths below %s",
				text.Clean(pattern, text.MaxName), deviceDir)
		}
	}

	return nil
}

// blockDevice is a block device of the node.
type blockDevice struct{ major, minor int64 }

// resolveBlockIO returns the parameters of a class. dir is the directory of device files. Later
// rules replace those for the same device. Devices that do not exist have no effect.
func resolveBlockIO(classes map[string][]blockIORule, name, dir string) (*specs.LinuxBlockIO, error) {
	rules, ok := classes[name]
	if !ok {
		return nil, fmt.Errorf("%q is not a class of --nri-blockio-config: %w", text.Clean(name, text.MaxName),
			errdefs.ErrInvalidArgument)
	}

	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()

	out := &specs.LinuxBlockIO{}
	byDevice := map[blockDevice]blockIORule{}
	for _, r := range rules {
		if len(r.Devices) == 0 {
			out.Weight = r.Weight
		}
		for _, pattern := range r.Devices {
			devices, err := findDevices(root, strings.TrimPrefix(pattern, deviceDir+"/"))
			if err != nil {
				return nil, err
			}
			for _, d := range devices {
				byDevice[d] = r
			}
		}
	}

	if len(byDevice) > maxBlockDevices {
		return nil, fmt.Errorf("class %q has %d devices, the maximum is %d", text.Clean(name, text.MaxName),
			len(byDevice), maxBlockDevices)
	}
	addDevices(out, byDevice)

	return out, nil
}

// findDevices returns the block devices below a directory that match a pattern. It follows symbolic
// links that stay in the directory.
func findDevices(root *os.Root, pattern string) (devices []blockDevice, err error) {
	names, err := fs.Glob(root.FS(), pattern)
	if err != nil {
		return nil, err
	}

	for _, name := range names {
		info, err := root.Stat(name)
		if err != nil || info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			devices = append(devices, blockDevice{int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))})
		}
	}

	return devices, nil
}

// addDevices adds the parameters of devices, sorted by their numbers.
func addDevices(to *specs.LinuxBlockIO, byDevice map[blockDevice]blockIORule) {
	order := func(a, b blockDevice) int {
		if a.major != b.major {
			return int(a.major - b.major)
		}
		return int(a.minor - b.minor)
	}

	for _, d := range slices.SortedFunc(maps.Keys(byDevice), order) {
		r := byDevice[d]
		if r.Weight != nil {
			w := specs.LinuxWeightDevice{Weight: r.Weight}
			w.Major, w.Minor = d.major, d.minor
			to.WeightDevice = append(to.WeightDevice, w)
		}

		for _, limit := range []struct {
			list *[]specs.LinuxThrottleDevice
			rate quantity
		}{
			{&to.ThrottleReadBpsDevice, r.ThrottleReadBps},
			{&to.ThrottleWriteBpsDevice, r.ThrottleWriteBps},
			{&to.ThrottleReadIOPSDevice, r.ThrottleReadIOPS},
			{&to.ThrottleWriteIOPSDevice, r.ThrottleWriteIOPS},
		} {
			if limit.rate > 0 {
				t := specs.LinuxThrottleDevice{Rate: uint64(limit.rate)}
				t.Major, t.Minor = d.major, d.minor
				*limit.list = append(*limit.list, t)
			}
		}
	}
}
