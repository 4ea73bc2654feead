// Package bundle reads and edits the OCI spec of a container before runc reads it. It changes the
// properties of the daemon's annotation alone and keeps every other field, also of newer versions
// of the spec.
package bundle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"

	"cri-dockerd/internal/shim/adjustment"
	"cri-dockerd/internal/shim/annotation"
)

const (
	file = "config.json"
	// maxSpec is the maximum size of a spec in bytes. Docker's largest parts are the environment
	// and the seccomp profile.
	maxSpec = 16 << 20
)

// Bundle is the bundle of a container.
type Bundle struct {
	Dir  string
	Spec *specs.Spec          // as read, before Apply
	Want annotation.Container // of the daemon; the zero value without its annotation
	// Adjust are the adjustments of NRI plugins, nil for none.
	Adjust *api.ContainerAdjustment

	deviceEnv []*api.KeyValue // of the CDI devices of plugins, after Apply
	raw       object
}

// object is a JSON object with undecoded values.
type object map[string]json.RawMessage

// Open reads the spec, the annotation and the adjustments of a bundle. Invalid ones are an error:
// the container must not start with less than the daemon wants. The name of the directory is the
// container's ID, as containerd names it.
func Open(dir string) (*Bundle, error) {
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		return nil, err
	}
	defer f.Close()

	text, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxSpec {
		return nil, fmt.Errorf("%s has more than %d bytes", f.Name(), maxSpec)
	}

	b := &Bundle{Dir: dir, Spec: &specs.Spec{}, raw: object{}}
	if err := errors.Join(json.Unmarshal(text, b.Spec), json.Unmarshal(text, &b.raw)); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}

	if value, ok := b.Spec.Annotations[annotation.Key]; ok {
		b.Want, err = annotation.Parse(value)
	}
	if a := b.Want.Adjustments; a != nil && !a.IsPod {
		b.Adjust, err = adjustment.Read(a.Directory, filepath.Base(dir))
	}

	return b, err
}

// UsesSystemd reports whether Docker runs with the systemd cgroup driver. cgroupsPath is
// "slice:prefix:name" then, and a path else (Docker, WithCgroups).
func (b *Bundle) UsesSystemd() bool {
	return b.Spec.Linux != nil && !strings.HasPrefix(b.Spec.Linux.CgroupsPath, "/") &&
		strings.Count(b.Spec.Linux.CgroupsPath, ":") == 2
}

// Apply writes the spec with the properties of the annotation. It does nothing if there are none.
// Limits of huge pages without support of the kernel are left out: an OCI runtime would fail even
// for a limit of 0, and the daemon reports the others. users is nil without a user namespace.
func (b *Bundle) Apply(canLimit func(pageSize string) bool, users *Users) error {
	want := b.Want
	want.Hugepages = maps.Clone(want.Hugepages)
	maps.DeleteFunc(want.Hugepages, func(size string, _ uint64) bool { return !canLimit(size) })
	joins := want.Sandbox != nil && want.Sandbox.NetNS != ""
	want.Sandbox, want.Output, want.Adjustments = nil, "", nil
	if want.IsZero() && !joins && isEmpty(b.Adjust) {
		return nil
	}

	var steps []func() error
	add := func(isNeeded bool, step func() error) {
		if isNeeded {
			steps = append(steps, step)
		}
	}

	add(true, func() error {
		return edit(b.raw, "process", func(p *object) error { return editProcess(*p, want) })
	})
	add(joins, func() error {
		return edit(b.raw, "linux", func(l *object) error {
			return edit(*l, "namespaces", func(all *[]specs.LinuxNamespace) error {
				*all = replaceNamespace(*all, specs.NetworkNamespace, b.Want.Sandbox.NetNS)
				return nil
			})
		})
	})
	add(len(want.RecursiveReadOnly) > 0, func() error {
		return edit(b.raw, "mounts", func(all *[]object) error { return makeRecursive(*all, want.RecursiveReadOnly) })
	})
	add(len(want.MountOptions) > 0, func() error {
		return edit(b.raw, "mounts", func(all *[]object) error { return addOptions(*all, want.MountOptions) })
	})
	add(len(want.Unified)+len(want.Hugepages) > 0, func() error {
		return edit(b.raw, "linux", func(l *object) error {
			return edit(*l, "resources", func(r *object) error { return editResources(*r, want) })
		})
	})
	add(users != nil, func() error { return b.setUsers(users) })
	add(!isEmpty(b.Adjust), b.adjust) // last, so that plugins adjust the complete spec

	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("spec of %s: %w", b.Dir, err)
		}
	}

	return b.write()
}

// replaceNamespace returns the namespaces with this one. A new one has no path.
func replaceNamespace(
	all []specs.LinuxNamespace, kind specs.LinuxNamespaceType, path string,
) []specs.LinuxNamespace {
	all = slices.DeleteFunc(all, func(n specs.LinuxNamespace) bool { return n.Type == kind })
	return append(all, specs.LinuxNamespace{Type: kind, Path: path})
}

// write replaces the spec. containerd and runc never see a part of it.
func (b *Bundle) write() error {
	text, err := json.Marshal(b.raw)
	if err != nil {
		return err
	}

	name := filepath.Join(b.Dir, file)
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return err
	}

	return os.Rename(name+".new", name)
}

// edit decodes the value of a key, changes it, and encodes it again. A missing value starts as the
// zero value.
func edit[T any](o object, key string, change func(*T) error) error {
	var v T
	if text, ok := o[key]; ok {
		if err := json.Unmarshal(text, &v); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}

	if m, ok := any(&v).(*object); ok && *m == nil {
		*m = object{}
	}

	if err := change(&v); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}

	text, err := json.Marshal(v)
	o[key] = text

	return err
}

// editProcess changes the groups and capabilities of a process, that of the spec or of an exec.
func editProcess(p object, want annotation.Container) error {
	if want.StrictGroups != nil {
		setStrict := func(user *object) error { return setGroups(*user, *want.StrictGroups) }
		if err := edit(p, "user", setStrict); err != nil {
			return err
		}
	}

	if len(want.Ambient) == 0 {
		return nil
	}

	return edit(p, "capabilities", func(c *specs.LinuxCapabilities) error { return addAmbient(c, want.Ambient) })
}

// setGroups sets the supplemental groups of a user. The primary group is one of them, as with
// Docker: a program that changes its group must not lose what denies this group access
// (CVE-2022-36109).
func setGroups(user object, groups []uint32) error {
	var u specs.User
	if err := json.Unmarshal(user["gid"], &u.GID); err != nil {
		return fmt.Errorf("gid: %w", err)
	}

	return edit(user, "additionalGids", func(gids *[]uint32) error {
		*gids = []uint32{u.GID}
		for _, g := range groups {
			if !slices.Contains(*gids, g) {
				*gids = append(*gids, g)
			}
		}
		return nil
	})
}

// addAmbient adds capabilities to the ambient set. The kernel requires them in the permitted and
// the inheritable set, too (capabilities(7)).
func addAmbient(c *specs.LinuxCapabilities, names []string) error {
	for _, name := range names {
		if !slices.Contains(c.Bounding, name) {
			return fmt.Errorf("%s is not in the bounding set, so it cannot be ambient", name)
		}

		for _, set := range []*[]string{&c.Effective, &c.Permitted, &c.Inheritable, &c.Ambient} {
			if !slices.Contains(*set, name) {
				*set = append(*set, name)
			}
		}
	}

	return nil
}

func editResources(r object, want annotation.Container) error {
	if len(want.Unified) > 0 {
		if err := edit(r, "unified", func(u *map[string]string) error {
			if *u == nil {
				*u = map[string]string{}
			}
			maps.Copy(*u, want.Unified)
			return nil
		}); err != nil {
			return err
		}
	}

	if len(want.Hugepages) == 0 {
		return nil
	}

	return edit(r, "hugepageLimits", func(limits *[]specs.LinuxHugepageLimit) error {
		for _, size := range slices.Sorted(maps.Keys(want.Hugepages)) {
			*limits = append(*limits, specs.LinuxHugepageLimit{Pagesize: size, Limit: want.Hugepages[size]})
		}
		return nil
	})
}
