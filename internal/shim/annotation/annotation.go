// Package annotation defines the annotation of Docker containers that describes to the containerd
// shim what Docker's API cannot express. The daemon writes it, and the shim reads it. See
// docs/adr/0011. The package has no dependencies, because the launcher of the shim must start fast.
package annotation

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
)

const (
	// Runtime is the shim's name for Docker (HostConfig.Runtime). containerd runs the program
	// containerd-shim-cri-dockerd-v1 for it.
	Runtime = "io.containerd.cri-dockerd.v1"
	// Key is the key of the annotation.
	Key = "io.cri-dockerd.container"
	// Group is the key of containerd's annotation for containers with a common shim process.
	Group = "io.containerd.runc.v2.group"
)

const (
	version = 1
	// maxSize bounds the annotation, in bytes. Its largest part are groups: Linux has at most
	// NGROUPS_MAX (65536) for a process, Kubernetes users have a few.
	maxSize    = 64 << 10
	maxGroups  = 4096
	maxEntries = 256
)

// Container describes the properties of a container without a field in Docker's API. The zero value
// changes nothing.
type Container struct {
	// StrictGroups are the only supplemental groups of the process, if it is not nil (CRI
	// SupplementalGroupsPolicy Strict).
	StrictGroups *[]uint32 `json:"strictGroups,omitempty"`
	// Ambient are capabilities for the ambient set, with the prefix CAP_. They must be in the
	// bounding set of the spec.
	Ambient []string `json:"ambient,omitempty"`
	// Unified are files of cgroup v2 with their content.
	Unified map[string]string `json:"unified,omitempty"`
	// Hugepages are limits in bytes by page size, such as "2MB".
	Hugepages map[string]uint64 `json:"hugepages,omitempty"`
	// RecursiveReadOnly are the paths of read-only mounts in the container whose submounts must be
	// read-only, too. Docker rejects such mounts for shims selected by name.
	RecursiveReadOnly []string `json:"recursiveReadOnly,omitempty"`
	// MountOptions are further options of mounts by their paths in the container: nodev, noexec,
	// nosuid.
	MountOptions map[string][]string `json:"mountOptions,omitempty"`
	// UserNS is the user namespace of the pod, nil for the node's.
	UserNS *UserNS `json:"userns,omitempty"`
	// IDMapped are the paths of mounts in the container whose files have the owners of the user
	// namespace.
	IDMapped []string `json:"idMapped,omitempty"`
	// Sandbox is set for the pause of a pod.
	Sandbox *Sandbox `json:"sandbox,omitempty"`
	// Output is the daemon's directory for the output of execs, "" for none. See OutputVariable.
	Output string `json:"output,omitempty"`
	// Adjustments is set if NRI plugins adjust the containers of the pod.
	Adjustments *Adjustments `json:"adjustments,omitempty"`
}

// Adjustments names the files with the adjustments of NRI plugins; see package adjustment.
type Adjustments struct {
	// Directory is the daemon's directory. Only root can change it.
	Directory string `json:"directory"`
	// IsPod is set for the pause of a pod. It has no file: the plugins adjust containers only.
	IsPod bool `json:"pod,omitempty"`
}

// OutputVariable is the environment variable of an exec whose output goes to the daemon directly,
// and not through the engine. Its value is a token. The shim removes the variable, and writes the
// output into the FIFOs <token>.stdout and <token>.stderr in the directory Container.Output. The
// engine sees no output, and the end of the output at the exit of the command.
const OutputVariable = "CRI_DOCKERD_OUTPUT"

// tokenSize is the size of a token in characters, that of crypto/rand.Text.
const tokenSize = 26

// IsToken reports whether a value of OutputVariable is valid. It is the name of a file, too.
func IsToken(s string) bool { return len(s) == tokenSize && isWord(s, upper+"234567") }

// OutputFiles returns the names of the FIFOs for stdout and stderr.
func OutputFiles(token string) [2]string { return [2]string{token + ".stdout", token + ".stderr"} }

// Sandbox describes the pause of a pod.
type Sandbox struct {
	// NetNS is the path of the network namespace to join, "" for that of the spec.
	NetNS string `json:"netns,omitempty"`
}

// UserNS describes a user namespace. It maps the IDs from 0 on to those of the node.
type UserNS struct {
	UIDs IDs `json:"uids"`
	GIDs IDs `json:"gids"`
}

// IDs is a range of users or groups of the node.
type IDs struct {
	First uint32 `json:"first"`
	Size  uint32 `json:"size"`
}

// IsMountOption reports whether a mount can have this further option. Each of them only forbids
// something.
func IsMountOption(option string) bool {
	return option == "nodev" || option == "noexec" || option == "nosuid"
}

// wire is the annotation's form.
type wire struct {
	Version int `json:"v"`
	Container
}

// IsZero reports whether c changes nothing.
func (c Container) IsZero() bool {
	return c.StrictGroups == nil && len(c.Ambient) == 0 && len(c.Unified) == 0 && len(c.Hugepages) == 0 &&
		len(c.RecursiveReadOnly) == 0 && len(c.MountOptions) == 0 && c.UserNS == nil && len(c.IDMapped) == 0 &&
		c.Sandbox == nil && c.Output == "" && c.Adjustments == nil
}

// Encode returns the value of the annotation. It returns an error for values that Parse rejects.
func (c Container) Encode() (string, error) {
	text, err := json.Marshal(wire{version, c})
	if err != nil {
		return "", fmt.Errorf("annotation %s: %w", Key, err)
	}

	if _, err := Parse(string(text)); err != nil {
		return "", err
	}

	return string(text), nil
}

// Parse parses and checks the value of the annotation. It rejects unknown versions and fields.
func Parse(text string) (Container, error) {
	c, err := parse(text)
	if err != nil {
		return Container{}, fmt.Errorf("annotation %s: %w", Key, err)
	}
	return c, nil
}

func parse(text string) (Container, error) {
	if len(text) > maxSize {
		return Container{}, fmt.Errorf("it has %d bytes, the maximum is %d", len(text), maxSize)
	}

	var w wire
	dec := json.NewDecoder(bytes.NewReader([]byte(text)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&w); err != nil {
		return Container{}, err
	}

	if dec.More() {
		return Container{}, errors.New("it has data after the object")
	}
	if w.Version != version {
		return Container{}, fmt.Errorf("version %d is unknown", w.Version)
	}

	return w.Container, w.check()
}

// The grammars below are not regular expressions: compiling those took most of the launcher's time.

const (
	upper  = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	lower  = "abcdefghijklmnopqrstuvwxyz"
	digits = "0123456789"
)

// maxName bounds the name of a capability, of a cgroup file (MAX_CFTYPE_NAME is 64) and of a page
// size, in bytes.
const maxName = 64

// isWord reports whether a string is a name of these characters.
func isWord(s, characters string) bool {
	return s != "" && len(s) <= maxName && strings.Trim(s, characters) == ""
}

// isCapability reports whether a string has the form CAP_NET_ADMIN.
func isCapability(s string) bool {
	name, ok := strings.CutPrefix(s, "CAP_")
	return ok && isWord(name, upper+"_")
}

// isUnifiedFile reports whether a string has the form of a controller's file, such as memory.high
// or hugetlb.2MB.max. The files of the core, such as cgroup.procs, move processes and change the
// hierarchy.
func isUnifiedFile(s string) bool {
	parts := strings.Split(s, ".")
	if len(parts) < 2 || parts[0] == "cgroup" {
		return false
	}

	for _, part := range parts {
		if !isWord(part, upper+lower+digits+"_-") {
			return false
		}
	}

	return true
}

// isPageSize reports whether a string has the form 2MB.
func isPageSize(s string) bool {
	for _, unit := range []string{"KB", "MB", "GB"} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			return isWord(number, digits) && number[0] != '0' && len(number) <= 10
		}
	}
	return false
}

// maxUnifiedValue bounds the content of a cgroup file, in bytes: a page, the kernel's limit of a
// write.
const maxUnifiedValue = 4096

func (c Container) check() error {
	if c.StrictGroups != nil && len(*c.StrictGroups) > maxGroups {
		return fmt.Errorf("%d groups, the maximum is %d", len(*c.StrictGroups), maxGroups)
	}
	if max(len(c.Ambient), len(c.Unified), len(c.Hugepages), len(c.RecursiveReadOnly), len(c.IDMapped),
		len(c.MountOptions)) > maxEntries {
		return fmt.Errorf("more than %d entries in one list", maxEntries)
	}

	for p, options := range c.MountOptions {
		for _, o := range options {
			if !IsMountOption(o) {
				return fmt.Errorf("mount %s: option %q is unknown", p, o)
			}
		}
	}

	for _, p := range slices.Concat(c.RecursiveReadOnly, c.IDMapped, slices.Collect(maps.Keys(c.MountOptions))) {
		if err := checkPath(p); err != nil {
			return fmt.Errorf("mount: %w", err)
		}
	}

	for _, name := range c.Ambient {
		if !isCapability(name) {
			return fmt.Errorf("%q is not a capability", name)
		}
	}

	for file, value := range c.Unified {
		if !isUnifiedFile(file) {
			return fmt.Errorf("%q is not the file of a controller of cgroup v2", file)
		}
		if len(value) > maxUnifiedValue || strings.ContainsRune(value, 0) {
			return fmt.Errorf("the value of %s is invalid", file)
		}
	}

	for size := range c.Hugepages {
		if !isPageSize(size) {
			return fmt.Errorf("%q is not a page size", size)
		}
	}

	if len(c.IDMapped) > 0 && c.UserNS == nil {
		return errors.New("mapped mounts need a user namespace")
	}

	return cmp.Or(c.checkDirectories(), c.UserNS.check(), c.Sandbox.check())
}

// checkDirectories checks the directories of the daemon.
func (c Container) checkDirectories() error {
	if c.Output != "" {
		if err := checkPath(c.Output); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	}

	if c.Adjustments != nil {
		if err := checkPath(c.Adjustments.Directory); err != nil {
			return fmt.Errorf("adjustments: %w", err)
		}
	}

	return nil
}

func (u *UserNS) check() error {
	if u == nil {
		return nil
	}
	return cmp.Or(u.UIDs.check("user"), u.GIDs.check("group"))
}

// check rejects ranges with root of the node, and with the invalid ID -1 (credentials(7)).
func (r IDs) check(kind string) error {
	if r.First == 0 || r.Size == 0 || uint64(r.First)+uint64(r.Size) > math.MaxUint32 {
		return fmt.Errorf("%d %ss from %d on cannot be mapped", r.Size, kind, r.First)
	}
	return nil
}

func (s *Sandbox) check() error {
	if s == nil || s.NetNS == "" {
		return nil
	}
	if err := checkPath(s.NetNS); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	return nil
}

func checkPath(p string) error {
	if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%q is not a clean absolute path", p)
	}
	return nil
}
