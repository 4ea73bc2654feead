package translate

import (
	"testing"

	"github.com/moby/moby/api/types/system"
)

func TestReadHost(t *testing.T) {
	in := system.Info{
		ServerVersion:   "20.10.24",
		CgroupDriver:    "systemd",
		SecurityOptions: []string{"name=seccomp,profile=default", "apparmor"},
		Runtimes:        map[string]system.RuntimeWithStatus{"runc": {}, "crun": {}},
	}

	h := ReadHost(in, "1.41", -5)
	if !h.Has("seccomp") || !h.Has("apparmor") || h.Has("selinux") || h.CgroupVersion != "1" ||
		h.Runtimes[0] != "crun" || h.ClampOOMScore(-998) != -5 || h.ClampOOMScore(7) != 7 {
		t.Errorf("%+v", h)
	}

	if h.AtLeast("1.44") || !h.AtLeast("1.41") || !h.AtLeast("1.9") {
		t.Error("API versions are not compared as numbers")
	}
}
