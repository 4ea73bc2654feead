package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
)

// store is a database of counters in one file.
type store struct {
	mu       sync.Mutex
	file     string
	counters map[string]int
}

// newStore opens the database in the directory of the argument.
func newStore(args []string) (http.Handler, error) {
	if len(args) != 1 {
		return nil, errors.New("usage: shop store DIRECTORY")
	}

	s := &store{file: filepath.Join(args[0], "counters.json"), counters: map[string]int{}}
	b, err := os.ReadFile(s.file)
	if errors.Is(err, os.ErrNotExist) {
		return service(s.respond), nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s.counters)
	}

	if err != nil {
		return nil, fmt.Errorf("read the database: %w", err)
	}

	return service(s.respond), nil
}

// respond returns a counter (GET), or increments it first (POST).
func (s *store) respond(r *http.Request) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()

	name := r.URL.Path[1:]
	if r.Method == http.MethodPost {
		s.counters[name]++
		if err := s.writeLocked(); err != nil {
			return "", err
		}
	}

	return strconv.Itoa(s.counters[name]), nil
}

// writeLocked replaces the file, so that a crash leaves the old or the new one.
func (s *store) writeLocked() error {
	b, err := json.Marshal(s.counters)
	if err == nil {
		err = os.WriteFile(s.file+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(s.file+".new", s.file)
	}

	return err
}
