package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// The IPAM plugin host-local reserves an address by creating a file with its name, and then writes
// the owner's ID into it. If it is killed in between, or the power fails, the file stays empty. No
// DEL finds the file, so the address stays reserved forever.

const (
	hostLocal     = "host-local"
	hostLocalData = "/var/lib/cni/networks" // default of dataDir
	hostLocalLock = "lock"                  // a running plugin holds flock(2) on it
	lockTimeout   = 2 * time.Second
	lockInterval  = 10 * time.Millisecond
)

// releaseTorn removes reservations without an owner from the networks of a configuration, and logs
// each. It holds the plugin's lock, so that no plugin is about to write the owner.
func (a *attacher) releaseTorn(ctx context.Context, list *libcni.NetworkConfigList) error {
	var errs []error
	for _, dir := range reservations(list) {
		addresses, err := releaseTornIn(ctx, dir)
		for _, address := range addresses {
			a.log.Warn("released an incomplete reservation of host-local", "address", address,
				"directory", dir)
		}
		errs = append(errs, err)
	}

	return errors.Join(errs...)
}

// reservations returns host-local's directories for the addresses of a configuration.
func reservations(list *libcni.NetworkConfigList) (dirs []string) {
	for _, p := range list.Plugins {
		var conf struct {
			IPAM struct {
				Type    string `json:"type"`
				DataDir string `json:"dataDir"`
			} `json:"ipam"`
		}

		if json.Unmarshal(p.Bytes, &conf) != nil || conf.IPAM.Type != hostLocal {
			continue
		}
		if conf.IPAM.DataDir == "" {
			conf.IPAM.DataDir = hostLocalData
		}

		dirs = append(dirs, filepath.Join(conf.IPAM.DataDir, list.Name)) // libcni has checked the name
	}

	return dirs
}

// releaseTornIn removes the empty reservations of one directory and returns their addresses.
func releaseTornIn(ctx context.Context, dir string) (released []string, err error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // no address was ever reserved
	} else if err != nil {
		return nil, fmt.Errorf("reservations of host-local: %w", err)
	}
	defer root.Close()

	torn, err := tornReservations(root)
	if err != nil || len(torn) == 0 {
		return nil, err
	}

	unlock, err := lockReservations(ctx, root)
	if err != nil {
		return nil, err
	}
	defer unlock()

	if torn, err = tornReservations(root); err != nil { // excluding those of running plugins
		return nil, err
	}

	for _, name := range torn {
		if err := root.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return released, fmt.Errorf("reservations of host-local: %w", err)
		}
		released = append(released, name)
	}

	return released, nil
}

// tornReservations returns the empty files with an address as their name.
func tornReservations(root *os.Root) (torn []string, err error) {
	dir, err := root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("reservations of host-local: %w", err)
	}
	defer dir.Close()

	entries, err := dir.ReadDir(-1)
	if err != nil {
		return nil, fmt.Errorf("reservations of host-local: %w", err)
	}

	for _, e := range entries {
		if _, err := netip.ParseAddr(e.Name()); err != nil || !e.Type().IsRegular() {
			continue
		}
		if info, err := root.Lstat(e.Name()); err == nil && info.Mode().IsRegular() && info.Size() == 0 {
			torn = append(torn, e.Name())
		}
	}

	return torn, nil
}

// lockReservations takes host-local's lock, or fails after lockTimeout.
func lockReservations(ctx context.Context, root *os.Root) (unlock func(), err error) {
	f, err := root.OpenFile(hostLocalLock, os.O_RDWR|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock reservations of host-local: %w", err)
	}

	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()

	tick := time.NewTicker(lockInterval)
	defer tick.Stop()

	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}

		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock reservations of host-local: %w", err), f.Close())
		case <-tick.C:
		}
	}
}
