package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// journal keeps a record of every ADD that has begun, from before its first plugin runs until the whole pod is made or a DEL has undone it,
// and of every DEL. libcni itself notes only what succeeded: after a daemon that was killed in the middle, nothing would know with which
// configuration to release what plugins had reserved.
//
// A record is also a lock: plugins inherit it open, so that a later daemon can wait for those that an earlier one left running, and no more
// than one chain of plugins works on a pod at any time.
type journal struct{ dir string }

// record is an ADD or a DEL in the words of libcni.NetworkAttachment.
type record struct {
	ContainerID  string         `json:"containerId"`
	Config       []byte         `json:"config"` // the network configuration list
	IfName       string         `json:"ifName"`
	Args         [][2]string    `json:"args"`
	Capabilities map[string]any `json:"capabilityArgs"`
}

// strayPatience is how long a DEL waits for plugins that an earlier daemon left running.
const strayPatience = 30 * time.Second

func (j journal) file(id string) string { return filepath.Join(j.dir, id) }

// begin notes an ADD or a DEL. The file is to be inherited by the plugins, and closed when they have ended.
func (j journal) begin(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (*os.File, error) {
	b, err := json.Marshal(record{rt.ContainerID, list.Bytes, rt.IfName, rt.Args, rt.CapabilityArgs})
	if err != nil {
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}
	// Written aside and renamed: a record is whole or not there.
	f, err := os.CreateTemp(j.dir, ".new-")
	if err != nil {
		return nil, fmt.Errorf("note what plugins are to do: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err == nil {
		err = os.Rename(f.Name(), j.file(rt.ContainerID))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("note what plugins are to do: %w", err), f.Close(), os.Remove(f.Name()))
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

// read is the record of a pod, nil if there is none.
func (j journal) read(id string) (*record, error) {
	b, err := os.ReadFile(j.file(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the note of what plugins were to do: %w", err)
	}
	r := &record{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("read the note of what plugins were to do, %s: %w", j.file(id), err)
	}
	return r, nil
}

// await waits until no plugin that the record speaks of runs any more, at most strayPatience.
func (j journal) await(ctx context.Context, id string) error {
	f, err := os.Open(j.file(id))
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

// list are the IDs of all pods with a record. What a crash left half-written is removed.
func (j journal) list() []string {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil
	}
	var ids []string
	for _, e := range entries {
		if e.Name()[0] == '.' {
			_ = os.Remove(filepath.Join(j.dir, e.Name()))
			continue
		}
		ids = append(ids, e.Name())
	}
	return ids
}

func (r *record) runtime(netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: r.ContainerID, NetNS: netns, IfName: r.IfName, Args: r.Args, CapabilityArgs: r.Capabilities}
}
