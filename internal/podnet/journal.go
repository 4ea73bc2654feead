package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
)

// journal records each ADD from before its first plugin runs until the pod is complete or a DEL has
// undone it. It also records each DEL. libcni records successful operations only: after a crash in
// between, the configuration for releasing the plugins' reservations would be lost.
//
// A record is also a lock. Plugins inherit the open file, so a later daemon can wait for plugins of
// an earlier one. At most one chain of plugins works on a pod at any time.
type journal struct {
	dir   string
	cache *cache // sets unusable records aside
}

// record is an ADD or a DEL, with the fields of libcni.NetworkAttachment.
type record struct {
	ContainerID  string         `json:"containerId"`
	Config       []byte         `json:"config"` // the network configuration list
	IfName       string         `json:"ifName"`
	Args         [][2]string    `json:"args"`
	Capabilities map[string]any `json:"capabilityArgs"`
	// Confirmed marks a complete pod. The record then replaces a cache entry.
	Confirmed bool `json:"confirmed,omitempty"`

	list *libcni.NetworkConfigList // parsed Config
}

// Arguments of begin.
const (
	unconfirmed = false
	confirmed   = true
)

// newRecord is the prefix of temporary files.
const newRecord = ".new-"

// strayTimeout limits how long a DEL waits for plugins of an earlier daemon, including a slow DEL.
const strayTimeout = 2 * time.Minute

func (j journal) file(id string) string { return filepath.Join(j.dir, id) }

// begin records an ADD or a DEL. The plugins inherit the returned file. The caller closes it after
// they have exited.
func (j journal) begin(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf, confirmed bool) (*os.File, error) {
	b, err := json.Marshal(record{
		ContainerID:  rt.ContainerID,
		Config:       list.Bytes,
		IfName:       rt.IfName,
		Args:         rt.Args,
		Capabilities: rt.CapabilityArgs,
		Confirmed:    confirmed,
	})
	if err != nil {
		return nil, fmt.Errorf("write journal record: %w", err)
	}

	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, fmt.Errorf("write journal record: %w", err)
	}

	f, err := safefs.CreateFile(j.file(rt.ContainerID), filepath.Join(j.dir, newRecord), b, func(f *os.File) error {
		return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	})
	if err != nil {
		return nil, fmt.Errorf("write journal record: %w", err)
	}

	return f, nil
}

// end removes a record.
func (j journal) end(id string) error {
	if err := os.Remove(j.file(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove journal record: %w", err)
	}
	return nil
}

// read returns the record of a pod, nil if there is none. An unusable record is set aside.
func (j journal) read(id string) (*record, error) {
	b, err := safefs.ReadFile(j.file(id), maxCacheFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}

	var r *record
	if err == nil {
		r, err = parseRecord(id, b)
	}

	if err != nil {
		if err := j.cache.setAside(j.dir, id, err); err != nil {
			return nil, fmt.Errorf("read journal record: %w", err)
		}
		return nil, nil
	}

	return r, nil
}

// parseRecord parses and checks the record of a pod.
func parseRecord(id string, b []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, boundError(err)
	}

	if r.ContainerID != id {
		return nil, fmt.Errorf("the file has the record of %s", excerpt([]byte(r.ContainerID)))
	}
	if err := utils.ValidateInterfaceName(r.IfName); err != nil {
		return nil, fmt.Errorf("ifName %q is not a valid interface name", excerpt([]byte(r.IfName)))
	}

	list, err := listFromBytes(r.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", boundError(err))
	}

	r.list = list

	return r, nil
}

// await waits, up to strayTimeout, until all plugins of the record have exited.
func (j journal) await(ctx context.Context, id string) error {
	f, err := safefs.OpenRegularPath(j.file(id))
	if err != nil {
		return nil // removed concurrently
	}
	defer f.Close()

	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()

	timeout := time.NewTimer(strayTimeout)
	defer timeout.Stop()

	for syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout.C:
			return nil // a concurrent DEL is better than none if the plugin hangs
		case <-tick.C:
		}
	}

	return nil
}

// list returns the IDs of all pods with a record. It removes temporary files of a crash and sets
// other files aside.
func (j journal) list() []string {
	dir, err := os.Open(j.dir)
	if err != nil {
		return nil
	}
	defer dir.Close()

	names, _ := dir.Readdirnames(maxCacheFiles)

	var ids []string
	for _, name := range names {
		_, err := model.ParseContainerID(name)
		switch {
		case err == nil:
			ids = append(ids, name)
		case strings.HasPrefix(name, newRecord):
			_ = os.Remove(filepath.Join(j.dir, name))
		case j.cache.isOurs(dir, name):
			_ = j.cache.setAside(j.dir, name, err)
		}
	}

	return ids
}

func (r *record) runtime(netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID:    r.ContainerID,
		NetNS:          netns,
		IfName:         r.IfName,
		Args:           cleanArgs(r.Args),
		CapabilityArgs: r.Capabilities,
	}
}
