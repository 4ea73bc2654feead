package bundle

import (
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"

	"cri-dockerd/internal/shim/annotation"
)

// Users are the parts of a container in a user namespace that the shim provides.
type Users struct {
	Root    string            // path of the mapped root
	Sources map[string]string // sources of mapped mounts, by their paths in the container
	NS      string            // path of the namespace to join, "" for a new one
}

// engineMounts are the mounts of the engine itself with files of the container. Their owners are
// those of the namespace.
var engineMounts = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm"}

// MappedMounts returns the bind mounts whose owners are those of the user namespace: sources by
// their paths in the container. Each mount of the annotation must exist.
func (b *Bundle) MappedMounts() (map[string]string, error) {
	sources := map[string]string{}
	for _, m := range b.Spec.Mounts {
		target := path.Clean(m.Destination)
		if m.Type == "bind" && (slices.Contains(b.Want.IDMapped, target) || slices.Contains(engineMounts, target)) {
			sources[target] = m.Source
		}
	}

	for _, target := range b.Want.IDMapped {
		if sources[target] == "" {
			return nil, fmt.Errorf("spec of %s: bind mount %s is missing", b.Dir, target)
		}
	}

	return sources, nil
}

// procNS is the path of a namespace of a process.
var procNS = regexp.MustCompile(`^/proc/([1-9][0-9]{0,9})/ns/ipc$`)

// PausePid returns the PID of the pod's pause, in whose namespaces a container starts. Docker names
// its IPC namespace. It returns 0 for the pause itself.
func (b *Bundle) PausePid() (int, error) {
	if b.Want.Sandbox != nil {
		return 0, nil
	}

	for _, ns := range b.Spec.Linux.Namespaces {
		if ns.Type == specs.IPCNamespace {
			if m := procNS.FindStringSubmatch(ns.Path); m != nil {
				return strconv.Atoi(m[1])
			}
		}
	}

	return 0, fmt.Errorf("spec of %s: the container does not join the IPC namespace of a pause", b.Dir)
}

// setUsers puts the container into its user namespace.
func (b *Bundle) setUsers(users *Users) error {
	if err := edit(b.raw, "root", func(r *object) error {
		return edit(*r, "path", func(p *string) error { *p = users.Root; return nil })
	}); err != nil {
		return err
	}

	replace := func(all *[]object) error { return replaceSources(*all, users.Sources) }
	if err := edit(b.raw, "mounts", replace); err != nil {
		return err
	}

	return edit(b.raw, "linux", func(l *object) error { return editLinux(*l, *b.Want.UserNS, users.NS) })
}

func replaceSources(all []object, sources map[string]string) error {
	for _, m := range all {
		var target, kind string
		if err := json.Unmarshal(m["destination"], &target); err != nil {
			return fmt.Errorf("destination: %w", err)
		}
		if text, ok := m["type"]; ok {
			if err := json.Unmarshal(text, &kind); err != nil {
				return fmt.Errorf("type: %w", err)
			}
		}

		source := sources[path.Clean(target)]
		if kind != "bind" || source == "" {
			continue
		}
		if err := edit(m, "source", func(s *string) error { *s = source; return nil }); err != nil {
			return err
		}
	}

	return nil
}

// pingGroups is the sysctl for the groups that may send ICMP echo requests. Docker permits all of
// the node, and a namespace has only some of them.
const pingGroups = "net.ipv4.ping_group_range"

func editLinux(l object, users annotation.UserNS, ns string) error {
	if err := edit(l, "namespaces", func(all *[]specs.LinuxNamespace) error {
		*all = replaceNamespace(*all, specs.UserNamespace, ns)
		return nil
	}); err != nil {
		return err
	}

	for key, ids := range map[string]annotation.IDs{"uidMappings": users.UIDs, "gidMappings": users.GIDs} {
		if err := edit(l, key, func(m *[]specs.LinuxIDMapping) error {
			*m = []specs.LinuxIDMapping{{HostID: ids.First, Size: ids.Size}}
			return nil
		}); err != nil {
			return err
		}
	}

	return edit(l, "sysctl", func(all *map[string]string) error {
		if (*all)[pingGroups] == "0 2147483647" {
			(*all)[pingGroups] = fmt.Sprintf("0 %d", users.GIDs.Size-1)
		}
		return nil
	})
}
