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

// journal keeps a record of every ADD that has begun, from before its first plugin runs until the
// whole pod is made or a DEL has undone it, and of every DEL. libcni itself notes only what
// succeeded: after a daemon that was killed in the middle, nothing would know with which
// configuration to release what plugins had reserved.
//
// A record is also a lock: plugins inherit it open, so that a later daemon can wait for those that
// an earlier one left running, and no more than one chain of plugins works on a pod at any time.
type journal struct {
	dir   string
	cache *cache // sets aside what cannot be used
}

// record is an ADD or a DEL in the words of libcni.NetworkAttachment.
type record struct {
	ContainerID  string         `json:"containerId"`
	Config       []byte         `json:"config"` // the network configuration list
	IfName       string         `json:"ifName"`
	Args         [][2]string    `json:"args"`
	Capabilities map[string]any `json:"capabilityArgs"`
	// the pod was complete: it stands for an entry of the cache
	Confirmed bool `json:"confirmed,omitempty"`

	list *libcni.NetworkConfigList // Config, parsed
}

// What begin notes of a pod.
const (
	unconfirmed = false
	confirmed   = true
)

// newRecord begins the names of records that are being written.
const newRecord = ".new-"

// strayPatience is how long a DEL waits for plugins that an earlier daemon left running, a slow DEL
// among them.
const strayPatience = 2 * time.Minute

func (j journal) file(id string) string { return filepath.Join(j.dir, id) }

// begin notes an ADD or a DEL. The file is to be inherited by the plugins, and closed when they
// have ended.
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
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}

	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}

	f, err := safefs.CreateFile(j.file(rt.ContainerID), filepath.Join(j.dir, newRecord), b, func(f *os.File) error {
		return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	})
	if err != nil {
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}

	return f, nil
}

// end forgets what was begun.
func (j journal) end(id string) error {
	if err := os.Remove(j.file(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget what plugins have done: %w", err)
	}
	return nil
}

// read is the record of a pod, nil if there is none. One that cannot be used is set aside.
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
			return nil, fmt.Errorf("read the note of what plugins were to do: %w", err)
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
		return nil, fmt.Errorf("it is the record of %s", shown([]byte(r.ContainerID)))
	}
	if err := utils.ValidateInterfaceName(r.IfName); err != nil {
		return nil, fmt.Errorf("ifName %q is no name of an interface", shown([]byte(r.IfName)))
	}

	list, err := listFromBytes(r.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", boundError(err))
	}

	r.list = list

	return r, nil
}

// await waits until no plugin that the record speaks of runs any more, at most strayPatience.
func (j journal) await(ctx context.Context, id string) error {
	f, err := safefs.OpenRegularPath(j.file(id))
	if err != nil {
		return nil // forgotten meanwhile
	}
	defer f.Close()

	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()

	patience := time.NewTimer(strayPatience)
	defer patience.Stop()

	for syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-patience.C:
			return nil // it hangs: a DEL beside it is better than none
		case <-tick.C:
		}
	}

	return nil
}

// list are the IDs of all pods with a record. What a crash left half-written is removed, and what
// is no record is set aside.
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
