package nri

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const blockIOClasses = `Classes:
  slow:
    - Weight: 80
    - Devices: ["/dev/sd[a-z]", "/dev/vd[a-z]"]
      ThrottleReadBps: 50M
      ThrottleWriteBps: 10Mi
      ThrottleReadIOPS: 10k
      ThrottleWriteIOPS: 500
      Weight: 50
    - Devices: ["/dev/disk/by-id/*SSD*"]
      ThrottleReadBps: 1G
  fast:
    - Weight: 400
`

// devices creates a directory like /dev: two disks, one of them with a link, a character device and
// a link out of the directory.
func devices(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	err := errors.Join(
		unix.Mknod(filepath.Join(dir, "sda"), unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))),
		unix.Mknod(filepath.Join(dir, "sdb"), unix.S_IFBLK|0o600, int(unix.Mkdev(8, 16))),
		unix.Mknod(filepath.Join(dir, "sdc"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))),
		os.MkdirAll(filepath.Join(dir, "disk/by-id"), 0o755),
		os.Symlink("../../sdb", filepath.Join(dir, "disk/by-id/ata-SSD-1")),
		os.Symlink("/dev/null", filepath.Join(dir, "sdd")),
	)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestResolveBlockIO(t *testing.T) {
	classes, err := readBlockIO("", writeValidator(t, blockIOClasses, 0o600))
	if err != nil {
		t.Fatal(err)
	}

	weight := func(w uint16) *uint16 { return &w }
	limit := func(minor int64, rate uint64) specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: rate}
		d.Major, d.Minor = 8, minor
		return d
	}
	sda := specs.LinuxWeightDevice{Weight: weight(50)}
	sda.Major = 8

	for class, want := range map[string]*specs.LinuxBlockIO{
		"fast": {Weight: weight(400)},
		"slow": {
			Weight:                  weight(80),
			WeightDevice:            []specs.LinuxWeightDevice{sda},
			ThrottleReadBpsDevice:   []specs.LinuxThrottleDevice{limit(0, 50_000_000), limit(16, 1_000_000_000)},
			ThrottleWriteBpsDevice:  []specs.LinuxThrottleDevice{limit(0, 10<<20)},
			ThrottleReadIOPSDevice:  []specs.LinuxThrottleDevice{limit(0, 10_000)},
			ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{limit(0, 500)},
		},
	} {
		got, err := resolveBlockIO(classes, class, devices(t))
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("class %s: %v, %s", class, err, diff)
		}
	}

	if _, err := resolveBlockIO(classes, "other", devices(t)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown class: %v", err)
	}
	if classes, err := readBlockIO("", ""); len(classes) > 0 || err != nil {
		t.Errorf("without a file: %v, %v", classes, err)
	}
}

func TestReadBadBlockIO(t *testing.T) {
	const rule = "Classes:\n  a:\n    - "
	for name, test := range map[string]struct{ text, want string }{
		"unknown field":     {rule + "Wait: 50\n", "Wait"},
		"weight":            {rule + "Weight: 9\n", "class \"a\", item 1: the Weight 9"},
		"large weight":      {rule + "Weight: 1001\n", "Weight"},
		"no devices":        {rule + "ThrottleReadBps: 1M\n", "Devices"},
		"no effect":         {rule + "Devices: [/dev/sda]\n", "neither"},
		"other directory":   {rule + "{Devices: [/etc/x], Weight: 50}\n", "/etc/x"},
		"pattern":           {rule + "{Devices: ['/dev/sd[a'], Weight: 50}\n", "/dev/sd[a"},
		"suffix":            {rule + "{Devices: [/dev/sda], ThrottleReadBps: 1MB}\n", "1MB"},
		"fraction":          {rule + "{Devices: [/dev/sda], ThrottleReadBps: 1.5M}\n", "1.5M"},
		"negative":          {rule + "{Devices: [/dev/sda], ThrottleReadBps: -1}\n", "-1"},
		"overflow":          {rule + "{Devices: [/dev/sda], ThrottleReadBps: 99999999999T}\n", "99999999999T"},
		"list for a number": {rule + "{Devices: [/dev/sda], ThrottleReadBps: [1]}\n", "whole number"},
	} {
		_, err := readBlockIO("", writeValidator(t, test.text, 0o600))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, test.want)
		}
	}
}
